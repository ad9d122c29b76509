"""Takes a run from its config to its folder: builds it, loops, survives, and shows people what happens."""
