"""The specification of a tower: what a user writes, prints and stores, before any parameter is bound.

- `level`: one level of a tower as plain values, which is all that the optimizer reads.
- `tower`: `Hyper`, the user's interface: building, stacking and binding levels.
- `text`: printing and parsing.
- `arguments`: validation of what a user gives.
"""
