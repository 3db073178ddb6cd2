"What can be wrong with a dataset."
