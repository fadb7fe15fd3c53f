"What must not change: the printed text of every recorded table"
from deepfid.experiments.registry import get_table
from deepfid.experiments.runner import read_record, show_record

def test_recorded_tables(repo):
    paths = sorted((repo/'nbs'/'results').glob('table-*.json'))
    golden = repo/'tests'/'golden'/'tables'
    assert {p.stem for p in paths}=={p.stem for p in golden.glob('*.md')}
    for path in paths:
        record = read_record(path)
        text = show_record(record, get_table(record['config']['table']))
        assert text+'\n'==(golden/f'{path.stem}.md').read_text(encoding='utf-8'), path.stem
