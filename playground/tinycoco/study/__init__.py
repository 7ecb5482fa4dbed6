"""Which preference objective is best at equal recall? A grid of trainings on TinyCOCO; `docs/study.html`."""
