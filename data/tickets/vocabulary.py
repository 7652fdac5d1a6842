"""Names and products of the ticket task; the train and held-out lists share no entry.

Brands, models and people are invented. First and last names are ordinary names of several
European languages and a few others, without those that are also English words ("Will", "Grace"):
a lower-case writer would make them unreadable.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN_FIRST = _words(
    """
    Aaron Adele Adrian Agnes Aisha Albert Alejandro Alessia Alexander Alicia Amelie Amina Anders
    Andrea Andrzej Anja Anneke Antoine Antonia Arjun Astrid Aurora Barbara Bartosz Beatrice Benedikt
    Bernard Bianca Bogdan Brigitte Camille Carla Carlos Caroline Catarina Cecilia Charlotte
    Christian Claire Claudia Clemens Colette Cristina Damian Daniela Dario Deepak Denise Diego
    Dimitri Dominik Dorothea Edith Eduardo Elena Elif Emanuele Emilia Emma Enrique Erika Esther Eva
    Fabian Farid Fatima Federico Felicia Fernando Filip Florian Francesca Franziska Frederik Gabriel
    Gerard Giorgio Giulia Gloria Gregor Guillaume Gustav Hannah Harald Hassan Heidi Helena Hendrik
    Henri Hugo Ibrahim Ines Ingrid Irene Isabel Ivan Jakob Jana Jasmin Javier Jeroen Johanna Jonas
    Jorge Judith Julien Karim Karolina Katarzyna Kenji Kerstin Klaus Lars Laura Leila Lena Leonardo
    Liam Linnea Lorenzo Lucia Ludwig Luis Magda Magnus Malte Manuel Marcel Margarita Marie Marta
    Matteo Mehmet Melanie Michel Miguel Monika Nadia Natalia Nicolas Nina Olga Oliver Oskar Pablo
    Paolo Patrick Paulina Pedro Petra Philippe Priya Rafael Rebecca Renata Ricardo Robert Rosalie
    Sabine Samuel Sandra Sébastien Silvia Simone Sofia Stefan Susanne Tamara Teresa Thomas Ursula
    Valentina Veronika Victor Walter Yusuf Yvonne Zeynep Zofia Jürgen René Zoë Núria Søren
    """
)

TRAIN_LAST = _words(
    """
    Aalto Abrams Albrecht Almeida Andersson Arnaud Bakker Banerjee Barbieri Baumann Becker Bellini
    Bergmann Bernasconi Blanchet Boateng Borowski Brandt Brunner Campbell Carvalho Castellano Chopra
    Christensen Colombo Cooper Costa Dahl Delgado Demir Desai Dijkstra Dubois Dupont Eriksson
    Esposito Fernandes Ferrari Fischer Fitzgerald Fontaine Friedrich García Gauthier González
    Gutierrez Haas Hansen Hartmann Hoffmann Horvat Ibarra Ivanov Jansen Johnson Kaminski Kaplan
    Keller Kowalski Kumar Laurent Lefebvre Lehmann Leroy Lombardi López Lorenz Marchetti Martinez
    Mendoza Meyer Moreau Moretti Murphy Navarro Nielsen Novak Nowak Okonkwo Olsen Ortega Öztürk
    Papadopoulos Patel Pereira Petersen Pfeiffer Popescu Quintero Ramirez Reinhardt Ricci Robinson
    Rossi Roussel Santoro Schmidt Schneider Schulz Silva Singh Sørensen Stewart Suzuki Tanaka Vargas
    Verhoeven Visser Vogel Wagner Weber Williams Yilmaz Zimmermann
    """
)

HELDOUT_FIRST = _words(
    """
    Adam Agata Anouk Beatriz Bruno Carmen Chiara Daan Dagmar Elsa Emre Erik Fiona Gemma Greta Hakim
    Hilde Igor Jelena Joaquin Katja Kofi Lieke Lukas Mara Marek Martina Mateus Mireille Nils Noemi
    Odile Omar Pavel Piotr Ravi Roland Saskia Sven Tobias Tom Ulrike Vera Wanda Xavier Yara
    """
)

HELDOUT_LAST = _words(
    """
    Acheampong Adler Bauer Beaumont Berglund Bianchi Castro Chowdhury Dekker Domingo Eklund Fabre
    Falk Ferreira Gallo Grabowski Haugen Hernandez Iyer Janssen Kessler Kovacs Kruger Lindqvist
    Mancini Mazur Mensah Mulder Müller Nakamura Nilsson Oliveira Pelletier Petrov Rahman Rinaldi
    Romero Sahin Sandberg Schreiber Thompson Ulrich Vermeulen Wójcik Zeller
    """
)

# A group says what a product can do, and so which complaints make sense about it:
# gadget (an app, a screen or none), display (a screen), appliance (a plug), furniture (has to be
# assembled), plain (none of these: nothing to set up, no guarantee case).
TRAIN_PRODUCTS: dict[str, tuple[str, ...]] = {
    "gadget": (
        "Arvo Smart Plug", "Arvo Hub Mini", "Belmor Doorbell Cam", "Belmor Cam 2",
        "Cindra Thermostat", "Cindra Heat Sensor", "Dovell BT40 Speaker", "Dovell Soundbar 300",
        "Elkora Fit Band 3", "Elkora Smart Scale", "Fennik Mesh Router", "Fennik AX12 Router",
        "Gavro Headset Pro", "Gavro Earbud Set", "Helvik Robot Vacuum R5", "Helvik Air Purifier 2",
        "Jorvik Pet Feeder", "Jorvik Garden Sensor", "Kestor Laser 220", "Kestor Photo Printer",
        "Lumexa Light Strip", "Lumexa Bulb E27",
    ),
    "display": (
        "Mirano Tablet 10", "Mirano Tablet Go", "Norvexa 27Q Monitor", "Norvexa Curve 34",
        "Ostra E-Reader", "Ostra Photo Frame 8", "Pellux Smartwatch S2", "Pellux Kids Watch",
        "Quorin Dash Cam", "Quorin Navi 7", "Rendal Laptop 14", "Rendal Book Air",
    ),
    "appliance": (
        "Sorva Kettle 1.7", "Sorva Toaster Duo", "Tavik Blender 900", "Tavik Hand Mixer",
        "Umbero Espresso One", "Umbero Coffee Grinder", "Velmo Rice Cooker", "Velmo Slow Cooker XL",
        "Wexton Iron 2400", "Wexton Steam Mop", "Yarrow Hair Dryer", "Yarrow Trimmer T3",
        "Zanto Cordless Drill", "Zanto Jigsaw 650", "Alpeno Fan Heater", "Alpeno Tower Fan",
        "Brisko Mini Fridge", "Brisko Ice Maker", "Corvane Sewing Machine", "Corvane Desk Lamp",
    ),
    "furniture": (
        "Dalby Standing Desk", "Dalby Corner Desk 140", "Eskil Bookshelf", "Eskil Shoe Rack",
        "Fjorda Bed Frame 160", "Fjorda Nightstand", "Grano Office Chair", "Grano Bar Stool",
        "Hartel Wardrobe 3D", "Hartel TV Bench", "Inverlo Baby Cot", "Inverlo High Chair",
        "Juno Trail Stroller", "Kalmia Greenhouse", "Kalmia Swing Seat", "Lodar Camping Tent 4P",
        "Lodar Bike Trailer", "Morvan Treadmill X", "Morvan Rowing Machine", "Nesto Crib Rail",
    ),
    "plain": (
        "Orlo Suitcase M", "Orlo Cabin Trolley", "Pravia Pan 28", "Pravia Casserole",
        "Riva Wall Mirror", "Riva Glass Vase", "Selka Lunch Box", "Selka Water Bottle",
        "Torvald Toolbox", "Torvald Cool Box 30", "Uldar Bike Helmet", "Uldar Ski Helmet",
        "Vintra Teapot", "Vintra Cutting Board", "Wolmar Plant Pot", "Wolmar Bird Feeder",
    ),
}  # fmt: skip

HELDOUT_PRODUCTS: dict[str, tuple[str, ...]] = {
    "gadget": (
        "Aurelo Smart Lock", "Bryvo Baby Monitor", "Caldex Wifi Repeater", "Drenna Speaker Mini",
        "Evora Sleep Tracker", "Fyrn Weather Station", "Glimo Lamp 2", "Hexa Scanner 410",
    ),
    "display": (
        "Istra Tablet 11", "Jalma Smartwatch Neo", "Kyro 32U Monitor", "Lirana E-Reader Plus",
        "Mavik Portable TV",
    ),
    "appliance": (
        "Nimra Juicer 500", "Olvar Kettle Pro", "Perrin Waffle Maker", "Quista Dehumidifier",
        "Rovik Angle Grinder", "Sundra Toaster 4S", "Tessio Espresso Mini", "Ubrik Vacuum V8",
    ),
    "furniture": (
        "Vasko Writing Desk", "Wilmar Gaming Chair", "Ystad Bookcase 80", "Zarin Bunk Bed",
        "Aldra Garden Bench", "Bokara Exercise Bike",
    ),
    "plain": (
        "Cresta Suitcase L", "Delmo Frying Pan", "Ferro Mixing Bowl", "Gandor Ladder 5",
        "Hylla Picture Frame", "Ilva Ceramic Mug",
    ),
}  # fmt: skip
