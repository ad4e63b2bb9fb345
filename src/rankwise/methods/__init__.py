"""One file a paper, and the recipe that composes them."""
