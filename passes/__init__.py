"""The passes that come with the toolkit: one file a pass, its name is the word in a recipe."""
