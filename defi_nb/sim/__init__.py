"CALVIN's rules, and the embedded simulator."
