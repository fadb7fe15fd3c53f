from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
      author=cfg['author'], license='Apache-2.0', python_requires=f">={cfg['min_python']}",
      long_description=(root/'README.md').read_text(encoding='utf-8') if (root/'README.md').exists() else '',
      long_description_content_type='text/markdown',
      packages=find_packages(include=['deepfid', 'deepfid.*']), package_data={'deepfid': cfg['package_data'].split()},
      install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['deepfid=deepfid._modidx:d']})
