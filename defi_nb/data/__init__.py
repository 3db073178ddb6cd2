"File formats; each ends in `Batch`."
