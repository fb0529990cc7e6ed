"""dynamo_box: an LLM serving stack for one machine.

This module stays empty of imports: `dynbox --help` and every engine venv pay for whatever it pulls in.
"""

__version__ = "0.1.0"
