"""What a checkpoint in the middle of gradient accumulation holds; resuming from it is tested in test_resume.py."""

import lightning as L
import torch
from tiny import TinyData, tiny_artifact

from cvae_lightning.callbacks import PartialGradients
from cvae_lightning.callbacks.partial_gradients import KEY
from cvae_lightning.losses import FreeEnergyLoss
from cvae_lightning.modules import SharedDiscreteCVAE


class Save(L.Callback):
    """Saves after every batch, and keeps the gradients as they were."""

    def __init__(self, folder):
        self.folder, self.gradients = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        trainer.save_checkpoint(self.folder / f"{len(self.gradients)}.ckpt")


def test_gradients_are_stored_between_the_batches_of_a_step_only(tmp_path):
    model = SharedDiscreteCVAE(tiny_artifact(tmp_path / "a"), {"free_energy_loss": FreeEnergyLoss()}, num_latents=2)
    save = Save(tmp_path)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        **options,
        enable_model_summary=False,
        max_epochs=1,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        callbacks=[PartialGradients(), save],
    )
    trainer.fit(model, TinyData(batch_size=2))  # three batches: a step after the second and, the epoch over, the third
    first, second, third = (torch.load(tmp_path / f"{i}.ckpt", weights_only=True) for i in (1, 2, 3))
    assert first[KEY].keys() == save.gradients[0].keys()
    assert all(torch.equal(value, save.gradients[0][name]) for name, value in first[KEY].items())
    assert any(value.abs().sum() > 0 for value in first[KEY].values())
    assert KEY not in second
    assert KEY not in third
