"""Publish SAEs on the Hugging Face Hub, in the format SAELens itself opens."""

from sae_lens_auxk.hub.errors import HubError
from sae_lens_auxk.hub.upload import Upload, upload_sae

__all__ = ["HubError", "Upload", "upload_sae"]
