"The package's metadata, read from settings.ini"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

def description():
    "The README, its relative links and pictures made absolute where the repository's address is known"
    text = (root/'README.md').read_text(encoding='utf-8')
    if not cfg['git_url']: return text
    address = lambda view, path: f"{cfg['git_url'].rstrip('/')}/{view}/{cfg['branch']}/{path}"
    relative = r'(?!\w+:|#|/)'
    text = re.sub(rf'(!\[[^\]]*\]\(|<img src="){relative}([^)"\s]+)', lambda m: m[1] + address('raw', m[2]), text)
    return re.sub(rf'(\]\(){relative}([^)\s]+)', lambda m: m[1] + address('blob', m[2]), text)

extras = {name: cfg[f'{name}_requirements'].split()
          for name in ('multi', 'onnx', 'openvino', 'ray', 'app', 'dlib', 'heic', 'hub', 'pretrained')}
extras['dev'] = cfg['dev_requirements'].split() + extras['multi'] + extras['onnx'] + extras['openvino'] + extras['heic'] + extras['pretrained']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    long_description=description(), long_description_content_type='text/markdown',
    license_expression=cfg['license'], license_files=['LICENSE'], url=cfg['git_url'] or None, keywords=cfg['keywords'].split(),
    classifiers=[f"Development Status :: {cfg['status']}", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3 :: Only',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['deepfid', 'deepfid.*'])+['deepfid.tutorials'], package_dir={'deepfid.tutorials': 'nbs/tutorials'},
    package_data={'deepfid': cfg['package_data'].split(), 'deepfid.tutorials': ['*.ipynb']},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]})
