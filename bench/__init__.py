"""How fast it is, side by side with what people would use instead: see docs/performance.md.

Servers are processes of their own; nothing here imports one. What is measured is a list of
samples, one per scenario, subject, case and round; every table and plot is made from them.
"""
