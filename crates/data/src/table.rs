//! Parquet files: written whole, or not at all, and to the same bytes each
//! time.
//!
//! A file is written beside its place, synced and renamed, so that a killed
//! run leaves nothing half. Row groups and batches have a fixed number of
//! rows, and no time or machine goes into the footer.

use crate::DataError;
use ashlar_core::Digest;
use datafusion::{
    arrow::{
        array::{Array, ArrayRef, AsArray, RecordBatch},
        datatypes::{DataType, Field, Schema},
    },
    parquet::{
        arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
        file::properties::WriterProperties,
    },
};
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Rows in a row group, and in a batch handed to the writer.
const GROUP: usize = 4096;

/// Names an I/O error's path.
pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> DataError + '_ {
    move |source| DataError::Io {
        path: path.to_owned(),
        source,
    }
}

/// A table from named columns.
pub(crate) fn table(columns: Vec<(&str, ArrayRef)>) -> Result<RecordBatch, DataError> {
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, a)| Field::new(*name, a.data_type().clone(), a.is_nullable()))
        .collect();
    let arrays = columns.into_iter().map(|(_, a)| a).collect();
    Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
}

/// Writes `bytes` by `fill` to `path` through a temporary file.
pub(crate) fn replace(
    path: &Path,
    fill: impl FnOnce(&mut File) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    let mut file = File::create(&temporary).map_err(io(&temporary))?;
    fill(&mut file)?;
    file.flush().map_err(io(&temporary))?;
    file.sync_all().map_err(io(&temporary))?;
    std::fs::rename(&temporary, path).map_err(io(path))
}

pub(crate) fn write(path: &Path, batch: &RecordBatch) -> Result<(), DataError> {
    replace(path, |file| {
        let properties = WriterProperties::builder()
            .set_max_row_group_row_count(Some(GROUP))
            .set_created_by("ashlar".to_owned())
            .build();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties))?;
        for from in (0..batch.num_rows()).step_by(GROUP) {
            writer.write(&batch.slice(from, GROUP.min(batch.num_rows() - from)))?;
        }
        writer.close()?;
        Ok(())
    })
}

/// `path`, or the file `name` in it when it is a folder.
pub(crate) fn locate(path: &Path, name: &str) -> PathBuf {
    if path.is_dir() {
        path.join(name)
    } else {
        path.to_owned()
    }
}

/// A Parquet file's batches, with typed access to its columns.
pub(crate) struct Table {
    path: PathBuf,
    pub(crate) batches: Vec<RecordBatch>,
}

impl Table {
    pub(crate) fn read(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(io(path))?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file)?.build()?;
        Ok(Self {
            path: path.to_owned(),
            batches: reader.collect::<Result<_, _>>()?,
        })
    }

    pub(crate) fn fault(&self, column: &str, problem: &str) -> DataError {
        DataError::Table {
            path: self.path.clone(),
            column: column.to_owned(),
            problem: problem.to_owned(),
        }
    }

    /// A column, once its type is what is expected.
    pub(crate) fn column<'a>(
        &self,
        batch: &'a RecordBatch,
        name: &str,
        kind: impl Fn(&DataType) -> bool,
    ) -> Result<&'a ArrayRef, DataError> {
        let column = batch
            .column_by_name(name)
            .ok_or_else(|| self.fault(name, "missing"))?;
        if kind(column.data_type()) {
            Ok(column)
        } else {
            Err(self.fault(name, &format!("has type {}", column.data_type())))
        }
    }

    /// Every value of a string column; nulls as `None`.
    pub(crate) fn strings(&self, name: &str) -> Result<Vec<Option<String>>, DataError> {
        let mut out = Vec::new();
        for batch in &self.batches {
            let column = self.column(batch, name, |t| *t == DataType::Utf8)?;
            out.extend(
                column
                    .as_string::<i32>()
                    .iter()
                    .map(|v| v.map(str::to_owned)),
            );
        }
        Ok(out)
    }

    /// As [`Self::strings`], where none may be null.
    pub(crate) fn texts(&self, name: &str) -> Result<Vec<String>, DataError> {
        self.strings(name)?
            .into_iter()
            .map(|v| v.ok_or_else(|| self.fault(name, "is null")))
            .collect()
    }

    /// A column of digests.
    pub(crate) fn digests(&self, name: &str) -> Result<Vec<Digest>, DataError> {
        self.texts(name)?
            .iter()
            .map(|v| v.parse().map_err(|e| self.fault(name, &format!("{e}"))))
            .collect()
    }
}
