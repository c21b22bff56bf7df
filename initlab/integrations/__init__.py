"""initlab in other people's loops. Each module needs the package it is named after; nothing is imported before.

lightning: `GradClipperCallback` and `TrainingGuardCallback`, for the Trainer of lightning and of pytorch_lightning.
transformers: `GradClipperMixin` and `TrainingGuardMixin`, for Hugging Face's Trainer and the classes derived from it.
accelerate: `AcceleratedGuard`. A clipper needs no module: `initlab.GradClipper(accelerator.prepare(optimizer), 1.0)`.

All are in docs/integrations.md.
"""
