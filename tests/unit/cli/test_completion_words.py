"""What the shell is offered for a profile."""

from __future__ import annotations

import subprocess
import sys

from dynamo_box.cli import complete
from dynamo_box.profile.load import list_profiles


def test_profiles_are_offered_by_name_without_being_read() -> None:
    assert complete.profiles("") == sorted(each.name for each in list_profiles())
    assert "smollm2" in complete.profiles("smo")
    script = (
        "import sys; from dynamo_box.cli import complete; complete.profiles(''); "
        "sys.exit('dynamo_box.profile.load' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
