# Sets RESULT to the folders nvidia/PATTERN of the wheels in the environment for which this is built. pip hides
# the packages of that environment from the build, but not its location.
function(find_wheel_folders RESULT PATTERN)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import glob, os, sys, sysconfig; print(';'.join(p for folder in [*sys.path, *map(sysconfig.get_path, ('purelib', 'platlib'))] for p in glob.glob(os.path.join(folder, 'nvidia', '${PATTERN}'))))"
    OUTPUT_VARIABLE FOLDERS
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${RESULT} ${FOLDERS} PARENT_SCOPE)
endfunction()
