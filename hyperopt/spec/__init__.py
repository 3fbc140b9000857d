"""The specification of a tower: what a user writes, prints and stores, before any parameter is bound; `tower.Hyper` first."""
