"""Tables, figures and a web page from run directories: reads files only, knows no other part of the
package.
"""
