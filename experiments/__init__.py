"""Training scripts that reproduce every figure and number of the README; run from the checkout with `python -m experiments.<name>`."""
