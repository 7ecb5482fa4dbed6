"""Numbers and strings that checkpoints, data files and prompts share; all as in LLaVA-v1.5."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds

LOGDIR = "."

IGNORE_INDEX = -100  # label of a position that is not supervised
IMAGE_TOKEN_INDEX = -200  # input id that the vision tower's features replace

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
