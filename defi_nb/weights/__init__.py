"Weights in and out: checkpoints, base models, official files."
