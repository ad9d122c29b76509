"""Problems from files, the hub or a task of our own; prompts; the base model of the demo."""
