"""Publish SAEs on the Hugging Face Hub, and fetch them, in the format SAELens itself opens."""

from sae_lens_auxk.hub.download import download_sae, list_saes
from sae_lens_auxk.hub.errors import HubError
from sae_lens_auxk.hub.upload import Upload, upload_sae

__all__ = ["HubError", "Upload", "download_sae", "list_saes", "upload_sae"]
