"""What does the operator hand to a site? The invitation file of a run."""

from __future__ import annotations

from pathlib import Path

from fedblocks.aggregator.auth import load_or_create_server_keys
from fedblocks.aggregator.run_folder import read_run_folder
from fedblocks.protocol import site_file
from fedblocks.protocol.site_file import SiteFile


def write_invitation(run: Path, *, name: str, out: Path, overrides: tuple[str, ...] = ()) -> SiteFile:
    """Write the invitation of the site ``name`` to ``out``; makes the run's server key if there is none yet.

    Raises:
        ConfigError: a setting or the name cannot be used.
        RunFolderError: ``run`` is no run folder.
    """
    folder = read_run_folder(run, overrides)
    site = SiteFile(
        client_name=name,
        address=folder.config.server.public_address,
        server_key=load_or_create_server_keys(run).public,
        run_id=folder.info.run_id,
        base_name=folder.info.base_name,
        base_hash=folder.info.base_hash,
        data=folder.data_format,
    )
    out.write_text(site_file.dump(site), encoding="utf-8")
    return site
