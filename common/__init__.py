"""The ground floor, which knows nothing of recommenders: settings, command lines, errors, files, processes, devices."""
