"""Numbers and strings that checkpoints, data files and prompts share; all as in LLaVA-v1.5."""

# In prompts: where an image goes, and the marks that older checkpoints put around it.
DEFAULT_IMAGE_TOKEN = "<image>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN = "<im_start>", "<im_end>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"

# In tensors.
IMAGE_TOKEN_INDEX = -200  # input id that the vision tower's features replace
IGNORE_INDEX = -100  # label of a position that is not supervised

# Of LLaVA's web server; kept for code that imports them.
LOGDIR = "."
WORKER_HEART_BEAT_INTERVAL = 15  # seconds
CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
