"""What a running application feels of `sottovoce migrate`: `python -m bench takeover`."""
