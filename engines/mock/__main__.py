from engines.host import main
from engines.mock.engine import MockEngine

main(MockEngine)
