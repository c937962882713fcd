"""Which folder does ``flwr run`` take? ``flwr run "$(python -m fedblocks.flower)" --run-config 'run="RUN"'``."""

from fedblocks.flower import APP_FOLDER

print(APP_FOLDER)
