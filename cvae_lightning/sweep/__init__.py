"""Search for options of a recipe: a benchmark of one recipe whose cells are proposed one trial after the other."""
