"""`python -m engines.native`: a worker with the native engine."""

from engines.host import main
from engines.native.engine import NativeEngine

main(NativeEngine)
