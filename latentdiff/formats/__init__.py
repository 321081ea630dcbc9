"""Files of models, in and out: diffusers folders, single files, scheduler configs, weights."""
