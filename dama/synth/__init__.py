"""`python -m dama synth`: preference pairs from generative and reward models, without people (PDS-DPO's pipeline)."""
