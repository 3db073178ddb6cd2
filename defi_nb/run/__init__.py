"Experiments: the command line, launching, the data and pretrained models of a run, benchmarks of speed."
