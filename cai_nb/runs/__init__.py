"""One recipe, one folder: stages in order, resumed after a kill, planned before and read afterwards."""
