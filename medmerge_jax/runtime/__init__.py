"""The machine: processes, signals, devices, cores, progress on the terminal, versions."""
