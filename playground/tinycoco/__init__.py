"""TinyCOCO: a procedurally drawn miniature of COCO on which the whole pipeline runs without any download."""
