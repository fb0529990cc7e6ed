"""The kvstore process: it owns the arenas of the host tier and the files of the disk tier, and deals in metadata.

service       its life, figures and commands
server        workers' connections: what they may ask, and who may still write where
layouts       the KV layouts, each with its share of the memory
layout        one of them: table, arena and disk put together
slots, order  its table: what is in which slot, and what goes next; pure
arena         its memory
write_back    what goes to disk, and when
disk_port     what all that needs of the disk tier, which is `disk` and what it names, or in rehearsals `modelled_disk`
events        what the router hears
"""
