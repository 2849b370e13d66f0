"""How many can it hold, and what do I buy for N users: see docs/capacity.md.

`measure` loads the real server at chosen points, `search` finds the highest load that meets the
objectives, `model` fits what each unit of work costs, `plan` turns the fit into machines.
"""
