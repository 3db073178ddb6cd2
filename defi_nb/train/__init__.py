"Optimiser, devices, the training loop, auxiliary losses."
