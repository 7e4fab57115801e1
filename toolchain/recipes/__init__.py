"""Recipes: TOML files that state how variants are built, so that `build` can build them again and compare their ids."""
