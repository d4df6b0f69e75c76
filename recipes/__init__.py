"""Recipes: plain builder functions over the public names of `pipeline`, and the data they ship."""
