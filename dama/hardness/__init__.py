"""The data-aware strategy's hardness (DAMA, Eq. 3-5): split answers into statements, score them with CLIP, sum up."""
