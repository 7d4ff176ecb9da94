"""Starting work and watching it: notebooks by papermill, trainings as detached processes. Loads without torch."""
