"""DAMA: what makes preference optimisation data- and model-aware, and the stages around it."""
