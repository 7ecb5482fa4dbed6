"""Does DAMA do what it claims? A grid of trainings on TinyCOCO, compared along their trade-off; `docs/study.html`."""
