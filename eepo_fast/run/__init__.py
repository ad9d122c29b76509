"""A run from its config to its folder: build, loop, what survives, what people see."""
