"The data contract, plots, video files, statistics, files and processes."
