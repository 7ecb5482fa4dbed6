"""What the task files name. lmms-eval loads this file anew for each name; what is to be loaded once is in scoring."""

from __future__ import annotations

from functools import partial

from eval.lmms_tasks.scoring import aggregation, doc_to_text, doc_to_visual, judged_doc_to_text, process_results

__all__ = ["doc_to_text", "judged_doc_to_text"]

OBJHAL = ("response_level", "chairs", "mention_level", "object_recall", "mean_words", "repeated_objects")
AMBER_G = ("chair", "cover", "hal", "cog", "cog_paper", "cover_unshadowed", "mean_words")
AMBER_D = ("accuracy", "precision", "recall", "f1", "existence_f1", "attribute_f1", "relation_f1")
MMHAL = ("score", "hallucination_rate", "informativeness", "mean_words")

objhal_visual, amber_visual, mmhal_visual = (partial(doc_to_visual, name) for name in ("objhal", "amber", "mmhal"))
objhal_results, amber_g_results, amber_d_results, mmhal_results = (
    partial(process_results, metrics) for metrics in (OBJHAL, AMBER_G, AMBER_D, MMHAL)
)

objhal_response_level = aggregation("objhal", "response_level")
objhal_chairs = aggregation("objhal", "chairs")
objhal_mention_level = aggregation("objhal", "mention_level")
objhal_object_recall = aggregation("objhal", "object_recall")
objhal_mean_words = aggregation("objhal", "mean_words")
objhal_repeated_objects = aggregation("objhal", "repeated_objects")

amber_chair = aggregation("amber", "chair")
amber_cover = aggregation("amber", "cover")
amber_hal = aggregation("amber", "hal")
amber_cog = aggregation("amber", "cog")
amber_cog_paper = aggregation("amber", "cog_paper")
amber_cover_unshadowed = aggregation("amber", "cover_unshadowed")
amber_mean_words = aggregation("amber", "mean_words")

amber_accuracy = aggregation("amber", "accuracy")
amber_precision = aggregation("amber", "precision")
amber_recall = aggregation("amber", "recall")
amber_f1 = aggregation("amber", "f1")
amber_existence_f1 = aggregation("amber", "existence_f1")
amber_attribute_f1 = aggregation("amber", "attribute_f1")
amber_relation_f1 = aggregation("amber", "relation_f1")

mmhal_score = aggregation("mmhal", "score")
mmhal_hallucination_rate = aggregation("mmhal", "hallucination_rate")
mmhal_informativeness = aggregation("mmhal", "informativeness")
mmhal_mean_words = aggregation("mmhal", "mean_words")
