"""Training that says how far it is and nothing else."""

from transformers import ProgressCallback, Trainer

from trainers.progress import ProgressOfTraining


# no log lines between the bars, nothing written but what is saved on purpose
QUIET = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True}


def train(trainer: Trainer, title: str) -> None:
    """Trains with one bar, if somebody watches, or else a line now and then."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressOfTraining(title))
    trainer.train()
    # the trainer turns it off for good, and a model that is saved so and loaded again would generate without a cache
    trainer.model.config.use_cache = True
