"""`python -m dama prepare`: from a data set as people have it to pairs that are checked, counted, ready to train on."""
