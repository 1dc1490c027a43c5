"""Plans beside runs: the time of each phase as predicted and as measured on this machine, over many configurations."""
